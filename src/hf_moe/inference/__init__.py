"""What happens with a trained model at inference, beyond a forward pass."""
