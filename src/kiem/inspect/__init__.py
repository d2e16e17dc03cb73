"""What a PyTorch program did and whether its gradients are right: record, explain, verify."""
