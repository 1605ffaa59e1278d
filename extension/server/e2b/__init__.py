"""E2B's wire: its published clients talk to Warmcell without a change. Everything goes through the keeper's REST."""
