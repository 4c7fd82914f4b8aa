"""Text in, statistics out: token windows, block inputs, Hessians. Imports neither `qtool` nor `formats`."""
