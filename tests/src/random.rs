//! Numbers that look random and are the same every time.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// From the seed in `ZINIT_TEST_SEED`, or this one.
    ///
    /// # Panics
    ///
    /// When the variable is no number.
    #[must_use]
    pub fn seeded(default: u64) -> Self {
        match std::env::var("ZINIT_TEST_SEED") {
            Ok(seed) => Self(seed.parse().expect("ZINIT_TEST_SEED is a number")),
            Err(_) => Self(default),
        }
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number() % end as u64).expect("less than a usize")
    }
}
