"""One model's life, and all models together."""
