//! Index files (.caibx, .caidx).
