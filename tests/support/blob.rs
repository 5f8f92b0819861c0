//! Deterministic noise, the same on every machine and in every program that checks ours.

/// The generator of the format notes: xorshift over 64 bits with a fixed start, each state as 8 little-endian bytes.
#[derive(Debug, Clone)]
pub struct Xorshift(u64);

impl Default for Xorshift {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Xorshift {
    /// The generator with another start than the usual one (0 is taken for 1, which would give only zeros).
    pub fn seeded(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// The next bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// The first `len` bytes of the generator: the blob of the published test vectors.
pub fn noise(len: usize) -> Vec<u8> {
    Xorshift::default().bytes(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use caifs::digest::Digest;

    #[test]
    fn the_noise_is_the_published_one() {
        let first = noise(16);
        assert_eq!(first, 0xad4d_f30b_ae77_1bdc_7660_6e02_b9ee_f064_u128.to_be_bytes());
        let id = Digest::Sha512_256.id(&noise(1 << 20));
        assert_eq!(id.to_hex(), "20c6d1e563c81f296f6d20e3fba97f43d328cecbd18fcd23c772d8f9828e7edc");
        assert_eq!(noise(5), first[..5]);
    }
}
