//! Messages with a checksum.

use prost::Message;
use prost::bytes::Bytes;

use phalanx_proto::StepPlan;

use crate::control::StepReply;
use crate::error::{WireError, present};
use crate::v1;

impl v1::Envelope {
    fn seal(message: &impl Message) -> Self {
        let payload = Bytes::from(message.encode_to_vec());
        let crc32c = Some(crc32c::crc32c(&payload));
        Self { payload, crc32c }
    }

    /// Nothing of the payload is looked at before its checksum holds.
    fn open<M: Message + Default>(self) -> Result<M, WireError> {
        let stated = present("crc32c", self.crc32c)?;
        let computed = crc32c::crc32c(&self.payload);
        if stated != computed {
            return Err(WireError::Checksum { stated, computed });
        }
        Ok(M::decode(self.payload)?)
    }
}

impl From<StepPlan> for v1::Envelope {
    fn from(plan: StepPlan) -> Self {
        Self::seal(&v1::StepPlan::from(plan))
    }
}

impl TryFrom<v1::Envelope> for StepPlan {
    type Error = WireError;

    fn try_from(envelope: v1::Envelope) -> Result<Self, WireError> {
        envelope.open::<v1::StepPlan>()?.try_into()
    }
}

impl From<StepReply> for v1::Envelope {
    fn from(reply: StepReply) -> Self {
        Self::seal(&v1::StepReply::from(reply))
    }
}

impl TryFrom<v1::Envelope> for StepReply {
    type Error = WireError;

    fn try_from(envelope: v1::Envelope) -> Result<Self, WireError> {
        envelope.open::<v1::StepReply>()?.try_into()
    }
}
