//! With whom a request shares a lock, and what follows for a line of requests: it is the one rule by which hosts grant
//! clustered locks.

use super::Terms;

/// With whom a request shares the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// With no other request.
    Exclusive,
    /// With other shared ones.
    Shared,
    /// With others that have room beside it, if all say the same number.
    Slots {
        /// How many there are.
        slots: u32,
        /// How many it takes.
        weight: u32,
    },
}

/// What the requests before another one mean for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Admitted,
    /// It waits.
    Excluded,
    /// It says another number of slots than the first of those before it, which says this number.
    Differs(u32),
}

impl From<&Terms> for Sharing {
    fn from(terms: &Terms) -> Sharing {
        match terms {
            Terms { shared: true, .. } => Sharing::Shared,
            Terms { slots: 0 | 1, .. } => Sharing::Exclusive,
            Terms { slots, .. } => Sharing::Slots { slots: *slots, weight: terms.weight_or_one() },
        }
    }
}

impl Sharing {
    /// Decides on a request with `before` in front of it in the line.
    ///
    /// Requests join the line at its end, and may leave it anywhere. So one that is admitted stays admitted until it leaves:
    /// to leave takes nothing from the requests behind. And no two are admitted that exclude each other, since the later one
    /// has the earlier one before it.
    pub fn verdict(self, before: impl IntoIterator<Item = Sharing>) -> Verdict {
        let mut taken = 0u32;
        let mut verdict = Verdict::Admitted;
        for other in before {
            match (self, other) {
                (Sharing::Shared, Sharing::Shared) => {}
                (Sharing::Slots { slots, .. }, Sharing::Slots { slots: theirs, .. }) if slots != theirs => {
                    return Verdict::Differs(theirs);
                }
                (Sharing::Slots { .. }, Sharing::Slots { weight, .. }) => {
                    taken = taken.saturating_add(weight);
                }
                _ => verdict = Verdict::Excluded,
            }
        }
        match self {
            Sharing::Slots { slots, weight } if taken.saturating_add(weight) > slots => Verdict::Excluded,
            _ => verdict,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Sharing; 7] = [
        Sharing::Exclusive,
        Sharing::Shared,
        Sharing::Slots { slots: 2, weight: 1 },
        Sharing::Slots { slots: 3, weight: 1 },
        Sharing::Slots { slots: 3, weight: 2 },
        Sharing::Slots { slots: 3, weight: 3 },
        Sharing::Slots { slots: 3, weight: u32::MAX },
    ];

    fn admitted(line: &[Sharing]) -> Vec<bool> {
        let verdict = |(index, one): (usize, &Sharing)| one.verdict(line[..index].iter().copied());
        line.iter().enumerate().map(verdict).map(|verdict| verdict == Verdict::Admitted).collect()
    }

    /// All lines of up to this length.
    fn lines(length: usize) -> Vec<Vec<Sharing>> {
        let mut all = vec![Vec::new()];
        let mut last = all.clone();
        for _ in 0..length {
            last = last.iter().flat_map(|line| KINDS.map(|kind| [&line[..], &[kind]].concat())).collect();
            all.extend(last.iter().cloned());
        }
        all
    }

    #[test]
    fn the_admitted_never_exclude_each_other_and_precede_all_others() {
        for line in lines(5) {
            let admitted = admitted(&line);
            assert!(admitted.is_sorted_by(|a, b| a >= b), "one overtakes in {line:?}");
            let holders: Vec<Sharing> =
                line.iter().zip(&admitted).filter(|(_, is)| **is).map(|(one, _)| *one).collect();
            let taken = |one: &Sharing| match one {
                Sharing::Slots { weight, .. } => u64::from(*weight),
                _ => 0,
            };
            match holders[..] {
                [] | [_] => {}
                [Sharing::Exclusive, ..] => panic!("{line:?} has holders beside an exclusive one"),
                [Sharing::Shared, ..] => assert!(holders.iter().all(|one| *one == Sharing::Shared)),
                [Sharing::Slots { slots, .. }, ..] => {
                    let same = |one: &Sharing| matches!(one, Sharing::Slots { slots: n, .. } if *n == slots);
                    assert!(holders.iter().all(same), "{line:?}");
                    assert!(holders.iter().map(taken).sum::<u64>() <= u64::from(slots), "{line:?}");
                }
            }
        }
    }

    #[test]
    fn the_admitted_stay_so_when_others_leave() {
        for line in lines(5) {
            let before = admitted(&line);
            for gone in 0..line.len() {
                let mut shorter = line.clone();
                shorter.remove(gone);
                let mut still = before.clone();
                still.remove(gone);
                let after = admitted(&shorter);
                assert!(still.iter().zip(&after).all(|(was, is)| !was || *is), "{line:?} without {gone}");
            }
        }
    }

    #[test]
    fn a_writer_that_waits_holds_back_later_readers() {
        let line = [Sharing::Shared, Sharing::Exclusive, Sharing::Shared];
        assert_eq!(admitted(&line), [true, false, false]);
        let two = Sharing::Slots { slots: 2, weight: 1 };
        let three = Sharing::Slots { slots: 3, weight: 1 };
        assert_eq!(three.verdict([two]), Verdict::Differs(2));
        assert_eq!(three.verdict([Sharing::Exclusive, two]), Verdict::Differs(2));
    }
}
