"""The bytes: what checkpoints and adapters look like on disk."""
