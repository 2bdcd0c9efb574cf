//! A queue that is fair among lanes by cost.

use std::collections::{HashMap, VecDeque};

/// What a lane may spend a turn: few texts take longer than one.
pub(super) const QUANTUM: usize = 128;

/// Lanes of items in order of arrival, emptied by deficit round robin (Shreedhar and Varghese,
/// 1995): each lane in turn may spend [`QUANTUM`] more, and what it can't spend it keeps for its
/// next turn. A lane with many or long items thus delays the others by no more than its share.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    lanes: HashMap<String, Lane<T>>,
    /// Lanes that have items; the first one's turn it is.
    turns: VecDeque<String>,
    items: usize,
    cost: usize,
}

#[derive(Debug)]
struct Lane<T> {
    /// Items with their cost.
    items: VecDeque<(usize, T)>,
    /// What the lane may still spend in this turn.
    deficit: usize,
    /// Whether the present turn's quantum has been granted: a batch can end within a turn.
    granted: bool,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            items: 0,
            cost: 0,
        }
    }
}

impl<T> FairQueue<T> {
    pub(super) fn push(&mut self, lane: &str, cost: usize, item: T) {
        self.items += 1;
        self.cost += cost;
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.items.push_back((cost, item));
            return;
        }
        self.turns.push_back(lane.to_owned());
        let lane_of_one = Lane {
            items: VecDeque::from([(cost, item)]),
            deficit: 0,
            granted: false,
        };
        self.lanes.insert(lane.to_owned(), lane_of_one);
    }

    pub(super) fn len(&self) -> usize {
        self.items
    }

    /// Cost of all items.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Takes items whose cost is within `budget` together; a first item that is over the budget
    /// by itself comes alone.
    pub(super) fn take(&mut self, budget: usize) -> Vec<T> {
        let mut taken = Vec::new();
        let mut left = budget;
        while let Some(name) = self.turns.front() {
            let Some(lane) = self.lanes.get_mut(name) else {
                self.turns.pop_front();
                continue;
            };
            if !lane.granted {
                lane.deficit += QUANTUM;
                lane.granted = true;
            }
            while let Some((cost, item)) = lane.items.pop_front() {
                if cost > left && !taken.is_empty() {
                    // The batch is full; the turn goes on with the next batch.
                    lane.items.push_front((cost, item));
                    return taken;
                }
                if cost > lane.deficit {
                    lane.items.push_front((cost, item));
                    break;
                }
                lane.deficit -= cost;
                left = left.saturating_sub(cost);
                self.items -= 1;
                self.cost -= cost;
                taken.push(item);
            }
            self.end_turn();
        }
        taken
    }

    /// Removes the items of a lane for which `unwanted` is true; says how many those were.
    pub(super) fn discard(&mut self, lane: &str, unwanted: impl Fn(&T) -> bool) -> usize {
        let Some(entry) = self.lanes.get_mut(lane) else {
            return 0;
        };
        let (items_before, cost_before) = (self.items, self.cost);
        entry.items.retain(|(cost, item)| {
            let gone = unwanted(item);
            if gone {
                self.items -= 1;
                self.cost -= cost;
            }
            !gone
        });
        if entry.items.is_empty() {
            self.lanes.remove(lane);
            self.turns.retain(|name| name != lane);
        }
        debug_assert!(self.items <= items_before && self.cost <= cost_before);
        items_before - self.items
    }

    /// The first lane goes to the end of the round, or out if it is empty.
    fn end_turn(&mut self) {
        let Some(name) = self.turns.pop_front() else {
            return;
        };
        match self.lanes.get_mut(&name) {
            Some(lane) if !lane.items.is_empty() => {
                lane.granted = false;
                self.turns.push_back(name);
            }
            _ => {
                // An idle lane saves nothing up.
                self.lanes.remove(&name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_lane_is_first_in_first_out_within_the_budget() {
        let mut queue = FairQueue::default();
        for i in 0..5 {
            queue.push("a", 10, i);
        }
        assert_eq!(queue.take(30), [0, 1, 2]);
        assert_eq!((queue.len(), queue.cost()), (2, 20));
        assert_eq!(queue.take(1000), [3, 4]);
        assert_eq!(queue.take(1000), [0; 0]);
    }

    #[test]
    fn an_item_over_the_budget_comes_alone() {
        let mut queue = FairQueue::default();
        queue.push("a", 500, "long");
        queue.push("a", 5, "short");
        assert_eq!(queue.take(100), ["long"]);
        assert_eq!(queue.take(100), ["short"]);
    }

    #[test]
    fn a_flooded_lane_leaves_others_their_share_of_tokens() {
        let mut queue = FairQueue::default();
        for _ in 0..1000 {
            queue.push("flood", 60, "flood");
        }
        // Short and long items: the share is of tokens, not of items.
        for _ in 0..100 {
            queue.push("short", 10, "short");
        }
        let mut spent = HashMap::new();
        for _ in 0..10 {
            for item in queue.take(200) {
                *spent.entry(item).or_insert(0_usize) += if item == "flood" { 60 } else { 10 };
            }
        }
        let (flood, short) = (spent["flood"], spent["short"]);
        assert!(
            flood - short <= QUANTUM + 60,
            "short {short}, flood {flood}"
        );
    }

    #[test]
    fn a_late_lane_waits_for_one_round_only() {
        let mut queue = FairQueue::default();
        for _ in 0..100 {
            queue.push("flood", 50, "flood");
        }
        queue.take(100);
        queue.push("late", 50, "late");
        let ahead: Vec<_> = (0..10).flat_map(|_| queue.take(50)).collect();
        let position = ahead.iter().position(|item| *item == "late");
        assert!(position.is_some_and(|place| place <= 2), "{ahead:?}");
    }

    #[test]
    fn discarded_items_leave_without_a_trace() {
        let mut queue = FairQueue::default();
        for i in 0..4 {
            queue.push("a", 10, i);
        }
        queue.push("b", 7, 100);
        assert_eq!(queue.discard("a", |i| i % 2 == 0), 2);
        assert_eq!((queue.len(), queue.cost()), (3, 27));
        assert_eq!(queue.discard("a", |_| true), 2);
        assert_eq!(queue.discard("nobody", |_| true), 0);
        assert_eq!(queue.take(1000), [100]);
        assert_eq!((queue.len(), queue.cost()), (0, 0));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_doubled_or_reordered(
            pushes in proptest::collection::vec((0usize..4, 1usize..300), 1..80),
            budget in 1usize..400,
        ) {
            let mut queue = FairQueue::default();
            let mut expected: HashMap<usize, Vec<usize>> = HashMap::new();
            for (i, (lane, cost)) in pushes.iter().enumerate() {
                queue.push(&lane.to_string(), *cost, i);
                expected.entry(*lane).or_default().push(i);
            }
            let mut got: HashMap<usize, Vec<usize>> = HashMap::new();
            while queue.len() > 0 {
                let batch = queue.take(budget);
                prop_assert!(!batch.is_empty());
                let cost: usize = batch.iter().map(|i| pushes[*i].1).sum();
                prop_assert!(cost <= budget || batch.len() == 1);
                for i in batch {
                    got.entry(pushes[i].0).or_default().push(i);
                }
            }
            prop_assert_eq!(got, expected);
            prop_assert_eq!(queue.cost(), 0);
        }
    }
}
