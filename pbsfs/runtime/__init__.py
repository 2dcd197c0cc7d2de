"""The process itself: its memory and secrets, its log, what it reports."""
