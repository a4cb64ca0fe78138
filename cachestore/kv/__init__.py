"""Keys and values of text chunks, kept in tiers below the engine's pool. Needs torch; the gateway never imports it."""
