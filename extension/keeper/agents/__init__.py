"""Sandboxes that code asks for, through the SDK or REST: their time, commands, runs, contexts and files."""
