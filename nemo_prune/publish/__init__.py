"""Publication on the Hub: releases and masks pushed in one commit."""
