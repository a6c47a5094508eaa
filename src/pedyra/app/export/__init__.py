"""An adapter is merged, and made smaller without rows."""
