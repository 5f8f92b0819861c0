//! The one provider of cryptography for TLS in this process.

use std::sync::Once;

/// Makes *ring* the process's provider, unless the program that uses this library has chosen one. Clients of HTTP need it before they
/// are built.
pub fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It fails only when there is a provider already, and that one is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
    });
}
