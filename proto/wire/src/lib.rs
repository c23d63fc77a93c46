//! The words of Phalanx on the wire: gRPC services and checked conversions.
