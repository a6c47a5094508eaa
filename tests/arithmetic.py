"""Which modules are pure functions on tensors and numbers."""

ARITHMETIC = [
    "pedyra.fitting.worth",
    "pedyra.lora.spectrum",
    *("pedyra.allocate.allocation", "pedyra.allocate.schedule"),
    *("pedyra.pe_dyra.equations", "pedyra.lora.spectrum"),
]
