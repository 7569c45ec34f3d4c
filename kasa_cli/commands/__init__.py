"""One verb a file: options to plan to stages to report."""
