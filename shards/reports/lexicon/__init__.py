"""Words of reports, English and French: anatomies, findings, cues, and what is known of diseases."""
