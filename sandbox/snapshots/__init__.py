"""Snapshots as the keeper sees them: engines behind one protocol, and the store of what they made."""
