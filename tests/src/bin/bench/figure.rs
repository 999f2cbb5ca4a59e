//! Figures: values of several rounds, and what is told of them.

use anyhow::{Context as _, Result};

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    Bytes,
    /// Of whatever the row names.
    Number,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Bytes => "bytes",
            Self::Number => "",
        }
    }

    /// As people write it.
    pub(crate) fn show(self, value: f64) -> String {
        let scaled = |units: &[(f64, &str)]| {
            let (size, name) = units
                .iter()
                .find(|(size, _)| value.abs() >= *size)
                .unwrap_or(&units[units.len() - 1]);
            let value = value / size;
            let digits = match value.abs() {
                100.0.. => 0,
                10.0.. => 1,
                _ => 2,
            };
            format!("{value:.digits$} {name}")
        };
        match self {
            Self::Nanoseconds => scaled(&[(1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns")]),
            Self::Bytes => scaled(&[(1_048_576.0, "MiB"), (1024.0, "KiB"), (1.0, "B")]),
            Self::Number => format!("{value}"),
        }
    }
}

/// What one contestant was measured to need, a value a round.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) values: Vec<f64>,
}

impl Series {
    /// One value, of something that does not vary.
    pub(crate) fn once(name: impl Into<String>, value: f64) -> Self {
        Self {
            name: name.into(),
            values: vec![value],
        }
    }
}

/// The middle of several values, and the half of them that lies around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) lower: f64,
    pub(crate) median: f64,
    pub(crate) upper: f64,
}

impl Spread {
    /// Median and quartiles, which lie between two values where no value is in the place.
    ///
    /// # Panics
    ///
    /// Without values.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Self {
            lower: at(0.25),
            median: at(0.5),
            upper: at(0.75),
        }
    }
}

/// What the median must not exceed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    /// So many times what the other one needs.
    Times(f64),
    /// So much, in the row's unit.
    Figure(f64),
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: Unit,
    pub(crate) outcome: Outcome,
    pub(crate) target: Option<Target>,
    pub(crate) note: Option<String>,
}

/// What came of measuring.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Measured {
        ours: Series,
        other: Option<Series>,
    },
    /// Why it was not measured.
    Skipped(String),
}

impl Row {
    pub(crate) fn figure(what: impl Into<String>, unit: Unit, ours: Series) -> Self {
        Self {
            what: what.into(),
            unit,
            outcome: Outcome::Measured { ours, other: None },
            target: None,
            note: None,
        }
    }

    /// Both have a value of each round.
    pub(crate) fn ratio(what: impl Into<String>, unit: Unit, ours: Series, other: Series) -> Self {
        Self {
            what: what.into(),
            unit,
            outcome: Outcome::Measured {
                ours,
                other: Some(other),
            },
            target: None,
            note: None,
        }
    }

    pub(crate) fn skipped(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            unit: Unit::Number,
            outcome: Outcome::Skipped(reason.into()),
            target: None,
            note: None,
        }
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// Ours through the other one's, round by round: what disturbed a round disturbed both.
    pub(crate) fn ratios(&self) -> Option<Spread> {
        let Outcome::Measured {
            ours,
            other: Some(other),
        } = &self.outcome
        else {
            return None;
        };
        let ratios: Vec<_> = ours.values.iter().zip(&other.values).map(|(a, b)| a / b).collect();
        Some(Spread::of(&ratios))
    }

    /// Whether the target is met, if there is one and it was measured.
    pub(crate) fn is_met(&self) -> Option<bool> {
        let Outcome::Measured { ours, .. } = &self.outcome else {
            return None;
        };
        match self.target? {
            Target::Times(most) => Some(self.ratios()?.median <= most),
            Target::Figure(most) => Some(Spread::of(&ours.values).median <= most),
        }
    }
}

/// One of those that are measured: its name, and what is done once a round, which returns what was needed.
pub(crate) type Contestant<'a> = (String, Box<dyn FnMut() -> Result<f64> + 'a>);

/// Measures each once a round, forwards and backwards in turn, so that none is always behind the same other.
///
/// # Errors
///
/// One that fails.
pub(crate) fn alternate(rounds: usize, contestants: Vec<Contestant<'_>>) -> Result<Vec<Series>> {
    let measured = alternate_with_peers(rounds, contestants).into_iter();
    measured.map(Measured::series).collect()
}

/// As [`alternate`], but one that fails takes no further part, and why it did is in its place.
pub(crate) fn alternate_with_peers(rounds: usize, mut contestants: Vec<Contestant<'_>>) -> Vec<Measured> {
    let mut measured: Vec<_> = contestants
        .iter()
        .map(|(name, _)| Measured {
            name: name.clone(),
            values: Ok(Vec::new()),
        })
        .collect();
    for round in 0..rounds {
        let mut order: Vec<_> = (0..contestants.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            if let Ok(values) = &mut measured[index].values {
                match (contestants[index].1)() {
                    Ok(value) => values.push(value),
                    Err(error) => measured[index].values = Err(error),
                }
            }
        }
    }
    measured
}

/// What [`alternate_with_peers`] has of one of them.
pub(crate) struct Measured {
    pub(crate) name: String,
    values: Result<Vec<f64>>,
}

impl Measured {
    /// Its values.
    ///
    /// # Errors
    ///
    /// Why it could not be measured.
    pub(crate) fn series(self) -> Result<Series> {
        let values = self.values.with_context(|| format!("{} failed", self.name))?;
        Ok(Series {
            name: self.name,
            values,
        })
    }

    /// The row of this one beside ours; one that says why if it could not be measured.
    pub(crate) fn beside(self, what: &str, unit: Unit, ours: &Series) -> Row {
        let name = self.name.clone();
        match self.series() {
            Ok(series) => Row::ratio(what, unit, ours.clone(), series),
            Err(error) => Row::skipped(format!("{what}, {name}"), format!("{error:#}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn series(values: &[f64]) -> Series {
        Series {
            name: "a".to_owned(),
            values: values.to_vec(),
        }
    }

    #[test]
    fn median_and_quartiles_of_values_in_any_order() {
        let spread = |lower, median, upper| Spread { lower, median, upper };
        assert_eq!(Spread::of(&[7.0]), spread(7.0, 7.0, 7.0));
        assert_eq!(Spread::of(&[3.0, 1.0]), spread(1.5, 2.0, 2.5));
        assert_eq!(Spread::of(&[5.0, 1.0, 4.0, 2.0, 3.0]), spread(2.0, 3.0, 4.0));
        assert_eq!(Spread::of(&[1.0, 1.0, 1.0, 1000.0]), spread(1.0, 1.0, 250.75));
    }

    #[test]
    fn ratios_are_those_of_the_same_round() {
        let row = Row::ratio("x", Unit::Number, series(&[2.0, 30.0, 4.0]), series(&[1.0, 10.0, 4.0]));
        assert_eq!(row.ratios().unwrap().median, 2.0);
        assert_eq!(row.is_met(), None);
        assert_eq!(row.clone().target(Target::Times(2.0)).is_met(), Some(true));
        assert_eq!(row.clone().target(Target::Times(1.9)).is_met(), Some(false));
        assert_eq!(row.target(Target::Figure(3.9)).is_met(), Some(false));
    }

    #[test]
    fn what_was_not_measured_meets_no_target() {
        let row = Row::skipped("x", "it is not there").target(Target::Times(2.0));
        assert_eq!((row.ratios(), row.is_met()), (None, None));
        let alone = Row::figure("x", Unit::Number, series(&[1.0])).target(Target::Times(2.0));
        assert_eq!(alone.is_met(), None);
    }

    #[test]
    fn each_is_measured_once_a_round_in_turning_order() {
        let seen = RefCell::new(String::new());
        let contestant = |name: &str, value: f64| -> Contestant<'_> {
            let (seen, letter) = (&seen, name.to_owned());
            (
                name.to_owned(),
                Box::new(move || {
                    seen.borrow_mut().push_str(&letter);
                    Ok(value)
                }),
            )
        };
        let series = alternate(3, vec![contestant("a", 1.0), contestant("b", 2.0)]).unwrap();
        assert_eq!(*seen.borrow(), "abbaab");
        assert_eq!(series[1].values, [2.0, 2.0, 2.0]);
    }

    #[test]
    fn one_that_fails_takes_no_further_part_and_says_why() {
        let mut tries = 0;
        let contestants: Vec<Contestant<'_>> = vec![
            ("a".to_owned(), Box::new(|| Ok(1.0))),
            (
                "b".to_owned(),
                Box::new(|| {
                    tries += 1;
                    Err(anyhow::anyhow!("no such thing"))
                }),
            ),
        ];
        let mut measured = alternate_with_peers(3, contestants).into_iter();
        assert_eq!(tries, 1);
        let ours = measured.next().unwrap().series().unwrap();
        assert_eq!(ours.values.len(), 3);
        let row = measured.next().unwrap().beside("x", Unit::Number, &ours);
        assert_eq!(row, Row::skipped("x, b", "b failed: no such thing"));
    }

    #[test]
    fn figures_are_shown_in_the_unit_that_fits() {
        assert_eq!(Unit::Nanoseconds.show(93.4), "93.4 ns");
        assert_eq!(Unit::Nanoseconds.show(0.5), "0.50 ns");
        assert_eq!(Unit::Nanoseconds.show(1_500.0), "1.50 µs");
        assert_eq!(Unit::Nanoseconds.show(123_456_789.0), "123 ms");
        assert_eq!(Unit::Bytes.show(26_214_400.0), "25.0 MiB");
        assert_eq!(Unit::Number.show(0.0), "0");
    }
}
