"""What the user wrote: parsed once, checked, frozen."""
