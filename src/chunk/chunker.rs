//! Where content is cut: the rolling hash (buzhash) of casync and desync.
//!
//! * [`Chunker`] finds the end of the chunk that begins at given bytes; it keeps nothing between two chunks, because the
//!   hash starts anew at every cut, so it can begin anywhere and be shared by threads.
//! * [`CutRule`] is the one difference between the two programs on default sizes.
//!
//! A cut depends on the 48 bytes before it and on the chunk's length only (formats.md 1.1 to 1.3). So bytes before
//! `min - 48` are never looked at. The test "hash % d == d - 1" is made by a multiplication: hash + 1 is divisible by
//! d exactly if its product with the inverse of d's odd part, rotated right by the number of d's factors of two, is at most
//! (2^32 - 1) / d. Hash + 1 wraps to 0 for the largest hash, which the test then takes for divisible: every hit is
//! tested again by the plain rule.
//!
//! Invariant: for the same bytes the cuts are those of the program whose rule was chosen.

use super::sizes::SizesError;
use crate::format::index::ChunkSizes;

/// Bytes that the hash covers.
pub const WINDOW_BYTES: usize = 48;

/// Bytes hashed in one round of the loop (measured: 4 is 4 % faster than 8, and 20 % faster than byte by byte).
const UNROLL: usize = 4;

/// Whose cuts are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CutRule {
    /// casync's: a chunk of exactly the minimum can be cut, and the discriminator lies between minimum and maximum.
    #[default]
    Casync,
    /// desync's: the shortest cut is one byte longer than the minimum, and the discriminator is what the formula gives.
    Desync,
}

/// Finds cuts.
#[derive(Debug, Clone)]
pub struct Chunker {
    sizes: ChunkSizes,
    rule: CutRule,
    /// Bytes before the first position that is hashed: the minimum, but at least a window.
    first: usize,
    max: usize,
    test: CutTest,
}

impl Chunker {
    /// A chunker for these sizes. Sizes out of bounds, and those whose chunks would break them, are errors.
    pub fn new(sizes: ChunkSizes, rule: CutRule) -> Result<Self, SizesError> {
        let wrong = |reason| Err(SizesError::Range { sizes, reason });
        if !sizes.are_valid() {
            return wrong("they must be 1 <= min <= avg <= max <= 128 MiB");
        }
        let fixed = sizes.min == sizes.max;
        if !fixed && sizes.max < WINDOW_BYTES as u64 {
            return wrong("the maximum must be at least 48 bytes (or equal to the minimum)");
        }
        if rule == CutRule::Desync && sizes.min < WINDOW_BYTES as u64 {
            return wrong("the minimum must be at least 48 bytes");
        }
        Ok(Self {
            sizes,
            rule,
            first: (sizes.min as usize).max(WINDOW_BYTES),
            max: sizes.max as usize,
            test: CutTest::new(discriminator(sizes, rule)),
        })
    }

    /// The sizes the chunks have.
    pub fn sizes(&self) -> ChunkSizes {
        self.sizes
    }

    /// No chunk is longer, in bytes; with that many bytes at hand [`Chunker::cut`] never asks for more.
    pub fn max_bytes(&self) -> usize {
        self.max
    }

    /// Length of the chunk that `data` begins with, when a cut before it made `data` a chunk's start.
    ///
    /// `at_end` says that nothing follows `data`: then the rest is the last chunk. `None` when more data is needed, and
    /// for no data at the end.
    pub fn cut(&self, data: &[u8], at_end: bool) -> Option<usize> {
        match self.find(&data[..data.len().min(self.max)]) {
            Some(len) => Some(len),
            None if data.len() >= self.max => Some(self.max),
            None if at_end && !data.is_empty() => Some(data.len()),
            None => None,
        }
    }

    /// All chunk lengths of a whole stream.
    pub fn cut_all<'a>(&'a self, data: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
        let mut rest = data;
        std::iter::from_fn(move || {
            let len = self.cut(rest, true)?;
            rest = &rest[len..];
            Some(len)
        })
    }

    /// The first position whose hash says cut.
    fn find(&self, data: &[u8]) -> Option<usize> {
        // Chunks of one size are cut by counting; so are those that can only end at the maximum.
        if self.first >= self.max || data.len() < self.first {
            return None;
        }
        let window_start = self.first - WINDOW_BYTES;
        let mut hash = hash_window(&data[window_start..self.first]);
        if self.rule == CutRule::Casync && self.test.hits(hash) {
            return Some(self.first);
        }

        let (entering, entering_rest) = data[self.first..].as_chunks::<UNROLL>();
        let (leaving, leaving_rest) = data[window_start..data.len() - WINDOW_BYTES].as_chunks::<UNROLL>();
        let mut position = self.first;
        for (entering, leaving) in entering.iter().zip(leaving) {
            // The hash after each byte is the hash before all of them, rotated, and what these bytes alone contribute. So
            // the bytes' part of one round is computed while the one before is still under way.
            let mut part = 0;
            let mut last = 0;
            for i in 0..UNROLL {
                part = roll(part, leaving[i], entering[i]);
                last = hash.rotate_left(i as u32 + 1) ^ part;
                if self.test.may_hit(last) && self.test.hits(last) {
                    return Some(position + i + 1);
                }
            }
            hash = last;
            position += UNROLL;
        }
        for (i, (entering, leaving)) in entering_rest.iter().zip(leaving_rest).enumerate() {
            hash = roll(hash, *leaving, *entering);
            if self.test.hits(hash) {
                return Some(position + i + 1);
            }
        }
        None
    }
}

/// The number whose last residue cuts: chunks of all lengths beyond the minimum come out at about the average.
///
/// desync does not bound what the formula gives. Where that is no number above 0 (averages from 9.3 MB) what desync does
/// depends on the processor, and casync's bound is taken.
fn discriminator(sizes: ChunkSizes, rule: CutRule) -> u32 {
    let avg = sizes.avg as f64;
    let raw = (avg / (-1.42888852e-7 * avg + 1.33237515)).trunc();
    let bounded = match rule {
        CutRule::Desync if (1.0..=f64::from(u32::MAX)).contains(&raw) => raw,
        // casync converts a negative number to an unsigned one, which comes out above every maximum.
        CutRule::Casync | CutRule::Desync if raw < 0.0 => sizes.max as f64,
        CutRule::Casync | CutRule::Desync => raw.max(sizes.min as f64).min(sizes.max as f64),
    };
    bounded as u32
}

/// Whether a hash cuts, for one discriminator.
#[derive(Debug, Clone, Copy)]
struct CutTest {
    discriminator: u32,
    odd_inverse: u32,
    n_twos: u32,
    largest: u32,
}

impl CutTest {
    fn new(discriminator: u32) -> Self {
        let discriminator = discriminator.max(1);
        let n_twos = discriminator.trailing_zeros();
        let odd = discriminator >> n_twos;
        // Newton's iteration doubles the number of right bits; an odd number is its own inverse in the last three.
        let mut inverse = odd;
        for _ in 0..4 {
            inverse = inverse.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(inverse)));
        }
        Self { discriminator, odd_inverse: inverse, n_twos, largest: u32::MAX / discriminator }
    }

    /// The quick test: says yes for every hash that cuts and for hardly any other.
    #[inline(always)]
    fn may_hit(self, hash: u32) -> bool {
        hash.wrapping_add(1).wrapping_mul(self.odd_inverse).rotate_right(self.n_twos) <= self.largest
    }

    /// The rule itself.
    #[inline]
    fn hits(self, hash: u32) -> bool {
        hash % self.discriminator == self.discriminator - 1
    }
}

/// The hash of a full window from nothing.
fn hash_window(window: &[u8]) -> u32 {
    window.iter().fold(0, |hash: u32, byte| hash.rotate_left(1) ^ TABLE[usize::from(*byte)])
}

/// Moves the window by one byte.
#[inline(always)]
fn roll(hash: u32, leaving: u8, entering: u8) -> u32 {
    hash.rotate_left(1) ^ (LEAVING[usize::from(leaving)] ^ TABLE[usize::from(entering)])
}

/// What a byte has become in the hash when it leaves the window, 48 rotations later.
const LEAVING: [u32; 256] = {
    let mut table = TABLE;
    let mut i = 0;
    while i < table.len() {
        table[i] = table[i].rotate_left(WINDOW_BYTES as u32);
        i += 1;
    }
    table
};

/// casync's and desync's constants, one for each byte value.
#[rustfmt::skip]
const TABLE: [u32; 256] = [
    0x458b_e752, 0xc107_48cc, 0xfbbc_dbb8, 0x6ded_5b68, 0xb10a_82b5, 0x20d7_5648, 0xdfc5_665f, 0xa842_8801,
    0x7ebf_5191, 0x8411_35c7, 0x65cc_53b3, 0x280a_597c, 0x16f6_0255, 0xc78c_bc3e, 0x2944_15f5, 0xb938_d494,
    0xec85_c4e6, 0xb7d3_3edc, 0xe549_b544, 0xfded_a5aa, 0x882b_f287, 0x3116_737c, 0x0556_9956, 0xe8cc_1f68,
    0x0806_ac5e, 0x22a1_4443, 0x1529_7e10, 0x50d0_90e7, 0x4ba6_0f6f, 0xefd9_f1a7, 0x5c5c_885c, 0x8248_2f93,
    0x9bfd_7c64, 0x0b3e_7276, 0xf268_8e77, 0x8fad_8abc, 0xb050_9568, 0xf1ad_a29f, 0xa53e_fdfe, 0xcb2b_1d00,
    0xf2a9_e986, 0x6463_432b, 0x9509_4051, 0x5a22_3ad2, 0x9be8_401b, 0x61e5_79cb, 0x1a55_6a14, 0x5840_fdc2,
    0x9261_ddf6, 0xcde0_02bb, 0x5243_2bb0, 0xbf17_373e, 0x7b7c_222f, 0x2955_ed16, 0x9f10_ca59, 0xe840_c4c9,
    0xccab_d806, 0x1454_3f34, 0x1462_417a, 0x0d4a_1f9c, 0x087e_d925, 0xd7f8_f24c, 0x7338_c425, 0xcf86_c8f5,
    0xb191_65cd, 0x9891_c393, 0x3253_84ac, 0x0308_459d, 0x8614_1d7e, 0xc922_116a, 0xe2ff_a6b6, 0x53f5_2aed,
    0x2cd8_6197, 0xf5b9_f498, 0xbf31_9c8f, 0xe041_1fae, 0x977e_b18c, 0xd877_0976, 0x9833_466a, 0xc674_df7f,
    0x8c29_7d45, 0x8ca4_8d26, 0xc49e_d8e2, 0x7344_f874, 0x556f_79c7, 0x6b25_eaed, 0xa03e_2b42, 0xf68f_66a4,
    0x8e8b_09a2, 0xf2e0_e62a, 0x0d3a_9806, 0x9729_e493, 0x8c72_b0fc, 0x160b_94f6, 0x450e_4d3d, 0x7a32_0e85,
    0xbef8_f0e1, 0x21d7_3653, 0x4e3d_977a, 0x1e7b_3929, 0x1cc6_c719, 0xbe47_8d53, 0x8d75_2809, 0xe6d8_c2c6,
    0x275f_0892, 0xc8ac_c273, 0x4cc2_1580, 0xecc4_a617, 0xf5f7_be70, 0xe795_248a, 0x375a_2fe9, 0x4255_70b6,
    0x8898_dcf8, 0xdc2d_97c4, 0x0106_114b, 0x364d_c22f, 0x1e0c_ad1f, 0xbe63_803c, 0x5f69_fac2, 0x4d5a_fa6f,
    0x1bc0_dfb5, 0xfb27_3589, 0x0ea4_7f7b, 0x3c1c_2b50, 0x21b2_a932, 0x6b12_23fd, 0x2fe7_06a8, 0xf9bd_6ce2,
    0xa268_e64e, 0xe987_f486, 0x3eac_f563, 0x1ca2_018c, 0x65e1_8228, 0x2207_360a, 0x57cf_1715, 0x34c3_7d2b,
    0x1f8f_3cde, 0x93b6_57cf, 0x31a0_19fd, 0xe69e_b729, 0x8bca_7b9b, 0x4c9d_5bed, 0x277e_beaf, 0xe0d8_f8ae,
    0xd150_821c, 0x3138_1871, 0xafc3_f1b0, 0x927d_b328, 0xe95e_ffac, 0x305a_47bd, 0x426b_a35b, 0x1233_af3f,
    0x686a_5b83, 0x50e0_72e5, 0xd9d3_bb2a, 0x8bef_c475, 0x487f_0de6, 0xc88d_ff89, 0xbd66_4d5e, 0x971b_5d18,
    0x63b1_4847, 0xd7d3_c1ce, 0x7f58_3cf3, 0x72cb_cb09, 0xc0d0_a81c, 0x7fa3_429b, 0xe915_8a1b, 0x225e_a19a,
    0xd8ca_9ea3, 0xc763_b282, 0xbb0c_6341, 0x020b_8293, 0xd4cd_299d, 0x58cf_a7f8, 0x91b4_ee53, 0x37e4_d140,
    0x95ec_764c, 0x30f7_6b06, 0x5ee6_8d24, 0x679c_8661, 0xa419_79c2, 0xf2b6_1284, 0x4fac_1475, 0x0adb_49f9,
    0x1972_7a23, 0x15a7_e374, 0xc43a_18d5, 0x3fb1_aa73, 0x342f_c615, 0x924c_0793, 0xbee2_d7f0, 0x8a27_9de9,
    0x4aa2_d70c, 0xe24d_d37f, 0xbe86_2c0b, 0x177c_22c2, 0x5388_e5ee, 0xcd8a_7510, 0xf901_b4fd, 0xdbc1_3dbc,
    0x6c0b_ae5b, 0x64ef_e8c7, 0x48b0_2079, 0x8033_1a49, 0xca3d_8ae6, 0xf354_6190, 0xfed7_108b, 0xc49b_941b,
    0x32ba_f4a9, 0xeb83_3a4a, 0x88a3_f1a5, 0x3a91_ce0a, 0x3cc2_7da1, 0x7112_e684, 0x4a30_96b1, 0x3794_574c,
    0xa3c8_b6f3, 0x1d21_3941, 0x6e0a_2e00, 0x2334_79f1, 0x0f4c_d82f, 0x6093_edd2, 0x5d7d_209e, 0x464f_e319,
    0xd4dc_ac9e, 0x0db8_45cb, 0xfb5e_4bc3, 0xe025_6ce1, 0x09fb_4ed1, 0x0914_be1e, 0xa5bd_b2c3, 0xc6eb_57bb,
    0x3032_0350, 0x3f39_7e91, 0xa677_91bc, 0x86bc_0e2c, 0xefa0_a7e2, 0xe9ff_7543, 0xe733_612c, 0xd185_897b,
    0x329e_5388, 0x91dd_236b, 0x2ecb_0d93, 0xf4d8_2a3d, 0x35b5_c03f, 0xe4e6_06f0, 0x05b2_1843, 0x37b4_5964,
    0x5eff_22f4, 0x6027_f4cc, 0x7717_8b3c, 0xae50_7131, 0x7bf7_cabc, 0xf9c1_8d66, 0x593a_de65, 0xd95d_df11,
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use proptest::prelude::*;

    /// The generator of formats.md 1.5.
    fn vector_bytes(len: usize) -> Vec<u8> {
        let mut x: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            bytes.extend_from_slice(&x.to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    fn lengths(sizes: ChunkSizes, rule: CutRule, data: &[u8]) -> Vec<usize> {
        Chunker::new(sizes, rule).unwrap().cut_all(data).collect()
    }

    /// The procedure of formats.md 1.3 as it is written there, hashing every window from nothing.
    fn naive(sizes: ChunkSizes, rule: CutRule, data: &[u8]) -> Vec<usize> {
        let d = discriminator(sizes, rule);
        let (min, max) = (sizes.min as usize, sizes.max as usize);
        let full = |window: &[u8]| {
            let rotated = window.iter().enumerate().map(|(i, b)| TABLE[usize::from(*b)].rotate_left(47 - i as u32));
            rotated.fold(0, |hash, term| hash ^ term)
        };
        let (mut start, mut lengths) = (0, Vec::new());
        while start < data.len() {
            let rest = &data[start..];
            let first_tested = match rule {
                CutRule::Casync => min.max(48),
                CutRule::Desync => min + 1,
            };
            let mut len = if min == max { max.min(rest.len()) } else { rest.len() };
            for end in first_tested..=rest.len() {
                if min == max {
                    break;
                }
                if end >= max || full(&rest[end - 48..end]) % d == d - 1 {
                    len = end;
                    break;
                }
            }
            lengths.push(len);
            start += len;
        }
        lengths
    }

    #[test]
    fn the_table_is_the_known_one() {
        let bytes: Vec<u8> = TABLE.iter().flat_map(|constant| constant.to_le_bytes()).collect();
        assert_eq!(TABLE[0], 0x458b_e752);
        assert_eq!(bytes.len(), 1024);
        assert_eq!(Digest::Sha256.id(&bytes).to_hex(), TABLE_SHA256);
    }

    const TABLE_SHA256: &str = "5b52080d38287da9d2e278466e3e0db7ec98e5e8b226f50612a56fa012b1f660";

    #[test]
    fn discriminators_are_those_of_the_formula() {
        let cases = [(1024, 768), (4096, 3075), (16384, 12318), (65536, 49535), (262_144, 202_440)];
        for (avg, expected) in cases {
            for rule in [CutRule::Casync, CutRule::Desync] {
                let sizes = ChunkSizes { min: avg / 4, avg, max: avg * 4 };
                assert_eq!(discriminator(sizes, rule), expected, "{avg}");
            }
        }
        let sizes = ChunkSizes { min: 65536, avg: 65536, max: 262_144 };
        assert_eq!(discriminator(sizes, CutRule::Casync), 65536);
        assert_eq!(discriminator(sizes, CutRule::Desync), 49535);
        let sizes = ChunkSizes { min: 1, avg: 1, max: 1000 };
        assert_eq!(discriminator(sizes, CutRule::Casync), 1);
        for avg in [8 << 20, 10 << 20, 32 << 20] {
            let sizes = ChunkSizes { min: avg / 4, avg, max: avg * 4 };
            assert_eq!(discriminator(sizes, CutRule::Casync), sizes.max as u32, "{avg}");
        }
    }

    #[test]
    fn vector_1_is_cut_alike_by_both_rules() {
        let data = vector_bytes(1 << 20);
        assert_eq!(data[..8], [0xad, 0x4d, 0xf3, 0x0b, 0xae, 0x77, 0x1b, 0xdc]);
        assert_eq!(
            Digest::Sha512_256.id(&data).to_hex(),
            "20c6d1e563c81f296f6d20e3fba97f43d328cecbd18fcd23c772d8f9828e7edc"
        );
        let expected = [
            31365, 23524, 106865, 66267, 46040, 21944, 20391, 17855, 73184, 62663, 23243, 87376, 32908, 79074, 73517,
            60810, 36511, 89243, 95796,
        ];
        for rule in [CutRule::Casync, CutRule::Desync] {
            assert_eq!(lengths(ChunkSizes::default(), rule, &data), expected);
        }
        assert_eq!(
            Digest::Sha512_256.id(&data[..31365]).to_hex(),
            "6eb188a6ceb8776177701a61f79b9a530faaaa88a29aaf2bb7901ba576a1a1fb"
        );
    }

    #[test]
    fn vector_2_is_cut_at_the_minimum_by_casync_only() {
        let mut data = vector_bytes(200_000);
        data[16380..16384].copy_from_slice(&32533u32.to_le_bytes());
        let sizes = ChunkSizes::default();
        assert_eq!(lengths(sizes, CutRule::Casync, &data), [16384, 38505, 106865, 38246]);
        assert_eq!(lengths(sizes, CutRule::Desync, &data), [31365, 23524, 106865, 38246]);
    }

    #[test]
    fn corner_cases_of_casync() {
        let data = vector_bytes(1000);
        let sizes = |min, avg, max| ChunkSizes { min, avg, max };
        // A discriminator of 1 cuts at every window.
        let every_window = lengths(sizes(1, 1, 1000), CutRule::Casync, &data);
        assert_eq!(every_window, [vec![48; 20], vec![40]].concat());
        assert_eq!(lengths(sizes(10, 10, 10), CutRule::Casync, &data), vec![10; 100]);
        assert!(Chunker::new(sizes(10, 20, 47), CutRule::Casync).is_err());
        assert!(Chunker::new(sizes(47, 64, 256), CutRule::Desync).is_err());
        assert!(Chunker::new(sizes(0, 64, 256), CutRule::Casync).is_err());
        assert!(Chunker::new(sizes(1, 64, (128 << 20) + 1), CutRule::Casync).is_err());
        assert_eq!(lengths(ChunkSizes::default(), CutRule::Casync, &[]), [0; 0]);
        assert_eq!(lengths(ChunkSizes::default(), CutRule::Casync, &data[..1]), [1]);
        let chunker = Chunker::new(ChunkSizes::default(), CutRule::Casync).unwrap();
        assert_eq!(
            (chunker.cut(&[], true), chunker.cut(&data, false), chunker.cut(&data, true)),
            (None, None, Some(1000))
        );
    }

    #[test]
    fn the_quick_test_misses_no_cut() {
        for discriminator in [1, 2, 3, 48, 768, 12318, 16384, 49535, 65536, 99999, 1 << 27] {
            let test = CutTest::new(discriminator);
            let near_the_end = u32::MAX - 1000..=u32::MAX;
            let mut n_false = 0;
            for hash in (0..200_000u32).chain(near_the_end) {
                assert!(test.may_hit(hash) || !test.hits(hash), "{discriminator} {hash}");
                n_false += u32::from(test.may_hit(hash) && !test.hits(hash));
            }
            assert!(n_false <= 1, "{discriminator}: {n_false} hits too many");
        }
    }

    /// Random, constant and repeating stretches.
    fn mixed_data() -> impl Strategy<Value = Vec<u8>> {
        let stretch = (any::<u64>(), 0u8..3, 1usize..3000).prop_map(|(seed, kind, len)| match kind {
            0 => vec![seed as u8; len],
            1 => (0..len).map(|i| (i % (1 + seed as usize % 100)) as u8).collect(),
            _ => {
                let mut x = seed | 1;
                let mut next = || {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    x as u8
                };
                (0..len).map(|_| next()).collect()
            }
        });
        proptest::collection::vec(stretch, 0..8).prop_map(|stretches| stretches.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn cuts_are_those_of_the_plain_procedure(
            data in mixed_data(), min in 1u64..600, avg in 0u64..600, max in 0u64..2000, casync in any::<bool>()
        ) {
            let rule = if casync { CutRule::Casync } else { CutRule::Desync };
            let min = if casync { min } else { min + 48 };
            let sizes = ChunkSizes { min, avg: min + avg, max: min + avg + max };
            if let Ok(chunker) = Chunker::new(sizes, rule) {
                let cuts: Vec<usize> = chunker.cut_all(&data).collect();
                prop_assert_eq!(&cuts, &naive(sizes, rule, &data));
                // With less data at hand the answer is the same or none.
                if let Some(len) = cuts.first() {
                    for shown in [*len / 2, *len, len + 1, len + 7, data.len()] {
                        let answer = chunker.cut(&data[..shown.min(data.len())], false);
                        prop_assert!(answer.is_none() || answer == Some(*len));
                    }
                }
            }
        }
    }
}
