"""The PEFT tuner: a backbone whose routed layers add each prompt's mix of deltas."""
