"""Which modules are pure functions on tensors and numbers."""

ARITHMETIC = [
    "pedyra.lora.spectrum",
    "pedyra.fitting.worth",
    "pedyra.allocate.allocation",
    "pedyra.allocate.schedule",
    "pedyra.pe_dyra.equations",
]
