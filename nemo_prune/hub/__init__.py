"""The Hub: releases and masks pushed in one commit, masks fetched."""
