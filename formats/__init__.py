"""The `.qtm` file: what its bytes mean (SPEC.md), and how to write and read them.

Import the module you need; nothing here imports torch or does work at import.

    errors     FormatError, the one exception of the package
    layer      QuantizedLinear and `decode`: what a code means
    bitpack    codes <-> bit planes
    encoding   a tensor <-> the bytes of its section
    preamble   the first 64 bytes
    header     the JSON table of what is in the file
    writer     Writer
    reader     QtmFile, verify
"""
