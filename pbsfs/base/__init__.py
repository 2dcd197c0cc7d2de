"""What every other module builds on: errors, names, and text that is fit to be shown. No I/O."""
