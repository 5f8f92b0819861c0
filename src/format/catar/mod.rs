//! Archives (.catar).
