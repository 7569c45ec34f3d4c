"""What tests build: models, adapters, matrices, broken files, runs of kasa; a file is named after what it builds."""
