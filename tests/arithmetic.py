"""Which modules are pure functions on tensors and numbers."""

ARITHMETIC = [
    "pedyra.lora.singular",
    "pedyra.fitting.balance",
    "pedyra.allocate.allocation",
    "pedyra.allocate.schedule",
    "pedyra.pe_dyra.equations",
]
