"""The tests, in the same folders as the rooms they test; `support` holds what they share."""
