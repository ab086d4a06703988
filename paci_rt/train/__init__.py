"""GPT-2, data, and a trainer on top of the public API. Nothing in paci_rt imports this package but its command line."""
