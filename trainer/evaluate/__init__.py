"""What policies are worth: samples of each, scored by reward services and judged, with 95 % intervals."""
