//! What a communicator may do next; pure.

use super::table::Code;

/// The life of a communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Ranks are finding each other.
    Initialising,
    /// Exchanges may be enqueued.
    Ready,
    /// Something failed or was late: it can only be aborted, or shrunk.
    Broken,
    /// Its memory is given back; nothing may touch it.
    Aborted,
}

/// What may happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// What a call, or the asynchronous state, answered.
    Answered(Code),
    /// The deadline passed first.
    Late,
    /// Abort was called, however it ended.
    Aborted,
}

impl State {
    /// The state after an event. Nothing leads out of [`State::Aborted`], and from [`State::Broken`] only abort.
    #[must_use]
    pub fn after(self, event: Event) -> Self {
        match (self, event) {
            (Self::Aborted, _) | (_, Event::Aborted) => Self::Aborted,
            (Self::Broken, _) | (_, Event::Late) => Self::Broken,
            (Self::Initialising | Self::Ready, Event::Answered(Code::IN_PROGRESS)) => self,
            (Self::Initialising | Self::Ready, Event::Answered(Code::SUCCESS)) => Self::Ready,
            (Self::Initialising | Self::Ready, Event::Answered(_)) => Self::Broken,
        }
    }

    /// Whether exchanges may be enqueued.
    #[must_use]
    pub const fn is_ready(self) -> bool {
        matches!(self, Self::Ready)
    }

    /// Whether the library may still be called with the communicator.
    #[must_use]
    pub const fn is_alive(self) -> bool {
        !matches!(self, Self::Aborted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 4] = [State::Initialising, State::Ready, State::Broken, State::Aborted];

    fn events() -> impl Iterator<Item = Event> {
        let answers = (-1..20).map(|code| Event::Answered(Code(code)));
        answers.chain([Event::Late, Event::Aborted])
    }

    #[test]
    fn the_way_there_and_back() {
        let walk = |events: &[Event]| events.iter().fold(State::Initialising, |state, event| state.after(*event));
        let [working, done, failed] = [Code::IN_PROGRESS, Code::SUCCESS, Code::REMOTE_ERROR].map(Event::Answered);
        assert_eq!(walk(&[working, working]), State::Initialising);
        assert_eq!(walk(&[working, done]), State::Ready);
        assert_eq!(walk(&[done, working, done]), State::Ready);
        assert_eq!(walk(&[working, failed, done]), State::Broken);
        assert_eq!(walk(&[working, Event::Late, done]), State::Broken);
        assert_eq!(walk(&[done, Event::Aborted, done]), State::Aborted);
    }

    #[test]
    fn no_event_mends_what_is_broken_or_revives_what_is_aborted() {
        for event in events() {
            assert_eq!(State::Aborted.after(event), State::Aborted, "{event:?}");
            let next = State::Broken.after(event);
            assert_eq!(next, if event == Event::Aborted { State::Aborted } else { State::Broken }, "{event:?}");
        }
    }

    #[test]
    fn only_success_makes_ready_and_any_other_end_breaks() {
        for state in [State::Initialising, State::Ready] {
            for code in (-1..20).map(Code) {
                let next = state.after(Event::Answered(code));
                let expected = match code {
                    Code::SUCCESS => State::Ready,
                    Code::IN_PROGRESS => state,
                    _ => State::Broken,
                };
                assert_eq!(next, expected, "{state:?} {code}");
                assert_eq!(next == State::Broken, code.is_failure());
            }
            assert_eq!(state.after(Event::Late), State::Broken);
        }
        assert_eq!(STATES.map(State::is_ready), [false, true, false, false]);
        assert_eq!(STATES.map(State::is_alive), [true, true, true, false]);
    }
}
