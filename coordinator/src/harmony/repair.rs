//! What the parser had to mend, counted.

/// A way in which the model's output strays from the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RepairKind {
    /// A message begins without `<|start|>`.
    MissingStart,
    /// A message begins before the one before it ended.
    MissingEnd,
    /// Content follows the header without `<|message|>`.
    MissingMessage,
    /// The header says not who speaks; the assistant does.
    MissingRole,
    /// `<|start|>` or the role stands twice.
    RepeatedRole,
    /// A message of the assistant names no channel.
    MissingChannel,
    /// The channel has a name that harmony does not know.
    UnknownChannel,
    /// The channel's name stands without `<|channel|>`.
    BareChannel,
    /// The header names a channel twice; the later one counts.
    RepeatedChannel,
    /// The recipient stands without `to=`.
    BareRecipient,
    /// A function is called on another channel than commentary; it is called nevertheless.
    CallChannel,
    /// The header holds words that belong to no header; they become content.
    HeaderText,
    /// The header exceeds [`HEADER_TOKENS_MAX`](super::HEADER_TOKENS_MAX); what follows is content.
    HeaderTooLong,
    /// The header is followed by no content; there was no message.
    EmptyHeader,
    /// Generation ended within a header.
    CutHeader,
    /// A control token stands where it means nothing, such as a second `<|end|>`.
    StrayMarker,
    /// A reserved token, or an id outside the vocabulary: it has no text.
    ReservedToken,
    /// The turn ended with thinking alone; the last thought is the answer.
    AnswerInAnalysis,
}

impl RepairKind {
    /// Every kind.
    pub const ALL: [Self; 18] = [
        Self::MissingStart,
        Self::MissingEnd,
        Self::MissingMessage,
        Self::MissingRole,
        Self::RepeatedRole,
        Self::MissingChannel,
        Self::UnknownChannel,
        Self::BareChannel,
        Self::RepeatedChannel,
        Self::BareRecipient,
        Self::CallChannel,
        Self::HeaderText,
        Self::HeaderTooLong,
        Self::EmptyHeader,
        Self::CutHeader,
        Self::StrayMarker,
        Self::ReservedToken,
        Self::AnswerInAnalysis,
    ];

    /// The name under which the kind is counted in metrics. It never changes.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::MissingStart => "missing_start",
            Self::MissingEnd => "missing_end",
            Self::MissingMessage => "missing_message",
            Self::MissingRole => "missing_role",
            Self::RepeatedRole => "repeated_role",
            Self::MissingChannel => "missing_channel",
            Self::UnknownChannel => "unknown_channel",
            Self::BareChannel => "bare_channel",
            Self::RepeatedChannel => "repeated_channel",
            Self::BareRecipient => "bare_recipient",
            Self::CallChannel => "call_channel",
            Self::HeaderText => "header_text",
            Self::HeaderTooLong => "header_too_long",
            Self::EmptyHeader => "empty_header",
            Self::CutHeader => "cut_header",
            Self::StrayMarker => "stray_marker",
            Self::ReservedToken => "reserved_token",
            Self::AnswerInAnalysis => "answer_in_analysis",
        }
    }
}

/// How often each kind of repair was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    counts: [u32; RepairKind::ALL.len()],
}

impl Repairs {
    /// Counts one repair.
    pub fn note(&mut self, kind: RepairKind) {
        let count = &mut self.counts[kind as usize];
        *count = count.saturating_add(1);
    }

    /// Counts all of `other` too.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count = count.saturating_add(more);
        }
    }

    /// How often `kind` was repaired.
    #[must_use]
    pub fn count(&self, kind: RepairKind) -> u32 {
        self.counts[kind as usize]
    }

    /// Whether nothing had to be repaired.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.iter().all(|&count| count == 0)
    }

    /// The kinds that occurred, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (RepairKind, u32)> + '_ {
        RepairKind::ALL.into_iter().zip(self.counts).filter(|&(_, count)| count > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kind_has_its_own_count_and_label() {
        let mut repairs = Repairs::default();
        for (at, kind) in RepairKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
            repairs.note(kind);
        }
        assert_eq!(repairs.iter().collect::<Vec<_>>(), RepairKind::ALL.map(|kind| (kind, 1)));
        assert_eq!(RepairKind::ALL.map(RepairKind::label).into_iter().collect::<HashSet<_>>().len(), 18);
    }
}
