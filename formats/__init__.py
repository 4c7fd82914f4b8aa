"""The `.qtm` file: what its bytes mean (SPEC.md), and how to write and read them.

Import the module you need; nothing here imports torch or does work at import.

    errors     FormatError for a file, KernelError for a device
    layer      QuantizedLinear, CodebookLinear, ...: the numbers of a section, and the weight they stand for
    bitpack    codes <-> bit planes
    trellis    the tables of trellis-coded quantization
    ternary    the tables of ternary streams: phrases, frequencies
    encoding   what a section is made of; a file an encoding
    section    a layer <-> the bytes of its section
    preamble   the first 64 bytes
    header     the JSON table of what is in the file
    writer     Writer
    reader     QtmFile, verify

What imports torch:

    kernels    multiplying by a section: numpy, torch, Triton
    modules    the modules that hold sections
    loader     a file as a transformers model: `placement` and `device` say what goes where, `build` puts `tensors`
               there, by `upload`; `streaming` copies blocks when their turn comes
    warm       kernels made ready on a GPU
    kv_cache   keys and values in 4 or 8 bits
    export     folders for other programs
    plugin     transformers' quantizer for packed folders, which `packed_model` checks; `plugin_hook` registers it
"""
