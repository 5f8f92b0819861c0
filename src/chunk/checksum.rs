//! XXH64, a fast 64-bit checksum against accidents: torn, swapped, flipped and overwritten bytes of our own files.
//!
//! Written from the algorithm's description (xxHash specification 0.1.1, "XXH64"); the tests hold it against zstd, whose
//! content checksum is its low half. It is no defence against people: what they may write to is hashed instead.

const PRIME_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME_5: u64 = 0x27D4_EB2F_1656_67C5;

/// Bytes that one round of all four lanes takes in.
const STRIPE_BYTES: usize = 32;

/// The checksum of some bytes.
pub(crate) fn xxh64(seed: u64, bytes: &[u8]) -> u64 {
    let mut stripes = bytes.chunks_exact(STRIPE_BYTES);
    let mut hash = match bytes.len() < STRIPE_BYTES {
        true => seed.wrapping_add(PRIME_5),
        false => {
            let mut lanes = [
                seed.wrapping_add(PRIME_1).wrapping_add(PRIME_2),
                seed.wrapping_add(PRIME_2),
                seed,
                seed.wrapping_sub(PRIME_1),
            ];
            for stripe in &mut stripes {
                for (lane, word) in lanes.iter_mut().zip(stripe.chunks_exact(8)) {
                    *lane = round(*lane, word_of(word));
                }
            }
            let [a, b, c, d] = lanes;
            let joined = a.rotate_left(1).wrapping_add(b.rotate_left(7));
            let joined = joined.wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18));
            lanes
                .into_iter()
                .fold(joined, |hash, lane| (hash ^ round(0, lane)).wrapping_mul(PRIME_1).wrapping_add(PRIME_4))
        }
    };
    hash = hash.wrapping_add(bytes.len() as u64);
    let mut words = stripes.remainder().chunks_exact(8);
    for word in &mut words {
        hash = (hash ^ round(0, word_of(word))).rotate_left(27).wrapping_mul(PRIME_1).wrapping_add(PRIME_4);
    }
    let mut rest = words.remainder();
    if let Some((half, after)) = rest.split_first_chunk::<4>() {
        let half = u64::from(u32::from_le_bytes(*half));
        hash = (hash ^ half.wrapping_mul(PRIME_1)).rotate_left(23).wrapping_mul(PRIME_2).wrapping_add(PRIME_3);
        rest = after;
    }
    for byte in rest {
        hash = (hash ^ u64::from(*byte).wrapping_mul(PRIME_5)).rotate_left(11).wrapping_mul(PRIME_1);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(PRIME_2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(PRIME_3);
    hash ^ (hash >> 32)
}

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(PRIME_2)).rotate_left(31).wrapping_mul(PRIME_1)
}

/// The little-endian number in 8 bytes.
fn word_of(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::codec;

    #[test]
    fn known_checksums() {
        assert_eq!(xxh64(0, b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(xxh64(0, b"a"), 0xD24E_C4F1_A98C_6E5B);
        assert_eq!(xxh64(0, b"abc"), 0x44BC_2CF5_AD77_0999);
        assert_ne!(xxh64(1, b"abc"), xxh64(0, b"abc"));
    }

    #[test]
    fn it_is_the_checksum_at_the_end_of_a_zstd_frame() {
        let bytes: Vec<u8> = (0..300u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for len in 1..bytes.len() {
            let frame = codec::encode_checked(&bytes[..len], 1);
            let tail = frame.last_chunk::<4>().map(|tail| u32::from_le_bytes(*tail));
            assert_eq!(tail, Some(xxh64(0, &bytes[..len]) as u32), "{len} bytes");
        }
    }
}
