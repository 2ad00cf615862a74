"""Questions about the loss, answered by measurement or on paper."""
