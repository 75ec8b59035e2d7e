// @ts-check
/* After everything was erased: what was typed and not sent is forgotten by this tab, too. */

import { dropDrafts } from "./drafts.js";

dropDrafts();
