"""Reports to terminal, JSON, CSV and Markdown."""
