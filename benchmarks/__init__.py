"""Speed studies; costs are quoted in gradients of the same model in the same run, and never asserted."""
