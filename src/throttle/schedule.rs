//! Which limit counts at which time of the day.

use super::Rate;

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// A time of the day with its own limit, in the local time of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// From, in minutes since midnight, 0 to 1439.
    pub from_minute: u16,
    /// Until, in minutes since midnight; less than `from_minute` for a window over midnight, equal for the whole day.
    pub until_minute: u16,
    /// The limit in it.
    pub rate: Rate,
}

impl Window {
    /// Whether the minute, since midnight, lies in it.
    pub fn contains(&self, minute: u16) -> bool {
        if self.from_minute < self.until_minute {
            (self.from_minute..self.until_minute).contains(&minute)
        } else {
            minute >= self.from_minute || minute < self.until_minute
        }
    }
}

/// The limit at one time of the day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InForce {
    /// The limit.
    pub rate: Rate,
    /// Where it comes from: `plan`, or `window 22:00-06:00`.
    pub reason: String,
    /// The next minute of the day, since midnight, at which another entry counts; `None` if that never happens.
    pub until_minute: Option<u16>,
}

/// The limits of a day: one for outside all windows, and the windows, of which the first that matches counts.
///
/// Knows nothing of dates. Who asks again every few seconds with [`minute_of_day`] is right on days with 23 and 25 hours
/// as well: a window then lasts as long as the clock on the wall says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    rate: Rate,
    windows: Vec<Window>,
}

impl Schedule {
    /// `rate` outside of all `windows`.
    pub fn new(rate: Rate, windows: Vec<Window>) -> Self {
        Self { rate, windows }
    }

    /// What counts at a minute of the day, 0 to 1439.
    pub fn at(&self, minute: u16) -> InForce {
        let minute = minute % DAY;
        let here = self.window(minute);
        let (rate, reason) = match here.map(|index| self.windows[index]) {
            Some(window) => {
                let (from, until) = (clock(window.from_minute), clock(window.until_minute));
                (window.rate, format!("window {from}-{until}"))
            }
            None => (self.rate, "plan".to_owned()),
        };
        InForce { rate, reason, until_minute: self.next_change(minute) }
    }

    fn window(&self, minute: u16) -> Option<usize> {
        self.windows.iter().position(|window| window.contains(minute))
    }

    fn next_change(&self, minute: u16) -> Option<u16> {
        let here = self.window(minute);
        let edges = self.windows.iter().flat_map(|window| [window.from_minute % DAY, window.until_minute % DAY]);
        edges.filter(|edge| self.window(*edge) != here).min_by_key(|edge| (edge + DAY - minute) % DAY)
    }
}

/// The minute of the day, as a clock on the wall shows it.
pub fn minute_of_day(now: &jiff::ZonedDateTime) -> u16 {
    u16::from(now.hour().unsigned_abs()) * 60 + u16::from(now.minute().unsigned_abs())
}

fn clock(minute: u16) -> String {
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use proptest::prelude::*;

    use super::*;

    fn rate(bytes: u64) -> Rate {
        Rate { bytes_per_second: NonZeroU64::new(bytes), operations_per_second: None }
    }

    fn window(from: (u16, u16), until: (u16, u16), bytes: u64) -> Window {
        Window { from_minute: from.0 * 60 + from.1, until_minute: until.0 * 60 + until.1, rate: rate(bytes) }
    }

    #[test]
    fn windows_switch_by_the_minute_and_over_midnight() {
        let schedule = Schedule::new(rate(1), vec![window((22, 0), (6, 0), 2), window((5, 30), (7, 15), 3)]);
        let at = |hour: u16, minute: u16| schedule.at(hour * 60 + minute);
        assert_eq!(at(21, 59), InForce { rate: rate(1), reason: "plan".into(), until_minute: Some(22 * 60) });
        let night = InForce { rate: rate(2), reason: "window 22:00-06:00".into(), until_minute: Some(6 * 60) };
        for (hour, minute) in [(22, 0), (23, 59), (0, 0), (5, 59)] {
            assert_eq!(at(hour, minute), night);
        }
        let morning = InForce { rate: rate(3), reason: "window 05:30-07:15".into(), until_minute: Some(7 * 60 + 15) };
        assert_eq!(at(6, 0), morning);
        assert_eq!(at(7, 14), morning);
        assert_eq!(at(7, 15).reason, "plan");
    }

    #[test]
    fn a_window_until_midnight_and_one_for_the_whole_day() {
        let evening = Schedule::new(rate(1), vec![window((18, 0), (0, 0), 2)]);
        assert_eq!((evening.at(1439).rate, evening.at(1439).until_minute), (rate(2), Some(0)));
        assert_eq!((evening.at(0).rate, evening.at(0).until_minute), (rate(1), Some(18 * 60)));
        let always = Schedule::new(rate(1), vec![window((8, 0), (8, 0), 2)]);
        assert_eq!((always.at(0).rate, always.at(480).rate), (rate(2), rate(2)));
        assert_eq!((always.at(0).until_minute, Schedule::default().at(5).until_minute), (None, None));
    }

    #[test]
    fn the_clock_on_the_wall_counts_when_it_is_set() {
        let berlin = jiff::tz::TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let minute =
            |utc: &str| minute_of_day(&utc.parse::<jiff::Timestamp>().unwrap().to_zoned_datetime(berlin.clone()));
        // On 29 March 2026 the clocks go from 02:00 to 03:00; on 25 October 02:30 is there twice.
        assert_eq!((minute("2026-03-29T00:59:59Z"), minute("2026-03-29T01:00:00Z")), (119, 180));
        assert_eq!((minute("2026-10-25T00:30:00Z"), minute("2026-10-25T01:30:00Z")), (150, 150));
    }

    proptest! {
        #[test]
        fn the_next_change_is_the_first_minute_at_which_something_else_counts(
            raw in prop::collection::vec((0u16..DAY, 0u16..DAY, 1u64..9), 0..4),
            minute in 0u16..DAY,
        ) {
            let windows = raw.iter().map(|&(from_minute, until_minute, bytes)| {
                Window { from_minute, until_minute, rate: rate(bytes) }
            });
            let schedule = Schedule::new(rate(100), windows.collect());
            let here = schedule.window(minute);
            let expected = (1..DAY).map(|later| (minute + later) % DAY).find(|at| schedule.window(*at) != here);
            prop_assert_eq!(schedule.at(minute).until_minute, expected);
        }
    }
}
