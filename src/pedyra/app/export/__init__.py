"""An adapter is merged, made smaller without rows, and served; and the Hub is asked."""
