"""SGT, selective ground-truth token training: selectors, the weighted loss, the gradient-coupling probe."""
