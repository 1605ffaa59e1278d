"""GPUs of this machine: what there is, what is asked for, and who has which."""
