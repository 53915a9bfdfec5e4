//! Data sets: pictures in, [-1, 1] channels-last numbers out.
