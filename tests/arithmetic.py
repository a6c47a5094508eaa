"""Which modules are pure functions on tensors and numbers."""

ARITHMETIC = [
    "pedyra.fit.worth",
    "pedyra.lora.spectrum",
    *("pedyra.allocate.allocation", "pedyra.allocate.batching", "pedyra.allocate.schedule"),
    *("pedyra.methods.paper", "pedyra.lora.spectrum"),
    *("pedyra.methods.pedyra.directions", "pedyra.methods.pedyra.noise", "pedyra.methods.pedyra.swaps"),
]
