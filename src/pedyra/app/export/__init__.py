"""Here an adapter is made fit for other readers, merged and served; and the Hub is asked."""
