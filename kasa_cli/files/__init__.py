"""The disk: untrusted input, durable writes, staging, locks and the store; without torch."""
