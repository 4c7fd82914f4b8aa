"""Where the formats of other engines have the codes, scales and zeros of a layer: both ways, exact."""
