//! Pictures out: grids, strips, PNG and GIF.
