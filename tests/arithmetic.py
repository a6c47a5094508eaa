"""Which modules are pure functions on tensors and numbers."""

ARITHMETIC = [
    "pedyra.fit.worth",
    "pedyra.lora.spectrum",
    *("pedyra.allocate.allocation", "pedyra.allocate.schedule"),
    *("pedyra.methods.paper", "pedyra.lora.spectrum"),
]
